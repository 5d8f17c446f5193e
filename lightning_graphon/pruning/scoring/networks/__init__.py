"""The networks that methods score: with absolute values, squares, ones or weights drawn anew, masked or not."""
