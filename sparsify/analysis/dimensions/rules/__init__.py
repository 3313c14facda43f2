"""What each operator does to rows of channels, one function per operator or family."""
