"""Tools of several families: numbers and words as bytes, alphabets, codebooks, tables of functions."""
