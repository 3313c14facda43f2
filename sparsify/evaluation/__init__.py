"""How good a pruned model is: perplexity, and passes side by side."""
