"""Other programs that train with the parts of this one, an adapter each. Nothing else of this package imports them."""
