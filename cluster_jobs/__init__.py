"""Operations: the command line, and where and how a run is run. Imports `deepclust`, never back."""
