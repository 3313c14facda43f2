"""Models measured and compared, as users call it: ``evaluate``, and passes side by side."""
