"""The sparsest model within a budget of quality, and what each layer and kind of layer costs."""
