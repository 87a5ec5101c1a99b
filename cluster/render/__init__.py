"""Files that start a cluster: for each target a template, and a function that fills it and rejects invalid options.

The templates (*.yaml) are what the user gets, with comments on what to edit; `template.fill` inserts the values.
"""
