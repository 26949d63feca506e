"""Feedback (StyleDrop 3.3): choosing the best of a pool, and training anew on the choice.

choice.py   a choice as a list of numbers, on a contact sheet or in a file
page.py     the page on which a person chooses
rounds.py   sample a pool, choose, train a new adapter
"""
