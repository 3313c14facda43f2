"""What a graph gives, held against what torch gives."""
