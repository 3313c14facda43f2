"""Recovery of a pruned model by training, its zeros held."""
