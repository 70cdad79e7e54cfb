"""What reproduces the papers: experiments, claims and their verdicts, the report.

Nothing below the commands imports it. An experiment is one file of ``analyses/``, which measures,
tabulates, draws and states its claims; this package runs it and puts the report together.
"""
