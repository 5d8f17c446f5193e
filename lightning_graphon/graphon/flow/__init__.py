"""How the graphon of a mask moves while the mask changes."""
