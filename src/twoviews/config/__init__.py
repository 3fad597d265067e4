"""From the command line to checked values and built parts: every mistake becomes one sentence that names the remedy.

The signature of what a group builds is the schema of its YAML: names, types and ranges stand there once.
"""
