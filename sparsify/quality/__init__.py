"""How good a model is on text: the losses of windows, perplexity, what was held out, and what two models differ by."""
