"""The verbs of the command line: one function each. Its docstring is the verb's help; torch is imported inside.

A verb takes the parsed arguments and returns a `Shown`, or None where it has written everything itself.
"""
