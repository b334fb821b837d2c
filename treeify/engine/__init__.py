"""A program of segments and packed tensors comes in; out go logits, by the fastest plan there is.

Programs and plans are frozen; parameters are changed by training alone, through their own modules.
"""
