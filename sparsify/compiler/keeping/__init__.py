"""What of a compile is kept until its output is there, and gone on with."""
