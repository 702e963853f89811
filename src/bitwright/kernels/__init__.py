"""Matrix products with low-bit weights; `reference` is the specification of all of them."""
