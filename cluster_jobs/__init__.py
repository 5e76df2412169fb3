"""Operations: the command line, executors, results and reports, never imported by `deepclust`."""
