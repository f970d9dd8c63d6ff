"""The modules that a prepared model is made of."""
