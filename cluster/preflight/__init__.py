"""Preflight's measurements on the nodes of a Ray cluster, each made by a process on that node."""
