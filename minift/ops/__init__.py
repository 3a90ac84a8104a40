"""Functions of tensors. Each file has a plain reference of at most ten lines and a faster version of the same.

`plain` makes the whole program run on the references: `python train.py --ops plain`. Use it to read what is
computed, or to find out whether a bug is in a fast version. Losses agree up to rounding.
"""

plain = False
