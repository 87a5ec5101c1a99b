"""Files that start a cluster: a template and a function for each target, which fills it and refuses what can't be.

The templates (*.yaml) are what the user gets, with the comments to edit them by; `template.fill` puts the values in.
"""
