"""An ensemble comes in; out goes proof that its leaves equal the untouched model, or the deviation.

Call `verify`; checks run on copies. Sweeps append rows to a file and change nothing else.
"""
