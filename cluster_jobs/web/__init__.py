"""`deepclust serve`: a page and an API over a folder of runs.

The run directories are the only truth. A server holds caches alone, so several may run at once. It
trusts nothing in a run, which may come from somebody else.
"""
