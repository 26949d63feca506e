"""What the two commands share: options, progress, and errors of one line.

options.py   types of arguments, the parser
terminal.py  lines of progress, run_command
tuning.py    tuning an adapter with progress
notes.py     notes on what the base does not understand in a prompt
"""
