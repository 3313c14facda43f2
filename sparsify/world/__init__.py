"""The processes of one job: what each has a share of, and how they tell each other."""
