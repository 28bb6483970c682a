"""Where the one record of truth lives: the coordinator protocol and its engines."""
