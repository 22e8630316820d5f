"""Training data: the table of examples, their encoded form, and the order in which they are drawn."""
