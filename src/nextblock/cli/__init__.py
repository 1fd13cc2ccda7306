"""The command line: commands, the options that they share, the live view, the demo.

May import every other package; commands import what needs torch only when they run. Start reading in `main.py`.
"""
