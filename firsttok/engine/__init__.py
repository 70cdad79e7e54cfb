"""How a batch goes through a bridge: with nothing implicit, and in as few steps as it takes.

It knows TransformerLens's bridge and no model of ours; ``FIRSTTOK_PLAIN=1`` turns off what is fast.
"""
