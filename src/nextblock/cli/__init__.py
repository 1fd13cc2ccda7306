"""The command line: options, commands, the live view, the demo.

Imports everything. Start reading in `main.py`.
"""
