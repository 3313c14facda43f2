"""What a trace needs beside the model: inputs whose numbers are known, faults put right, loops kept whole."""
