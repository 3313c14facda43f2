"""How good an image classifier is: which folder is which of its classes, and how often it names the right one."""
