"""The commands, a module each with a function ``run``; it is imported when the command is run.

So the modules import what they need at the top, and ``firsttok --help`` waits for none of it.
"""
