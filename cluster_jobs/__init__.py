"""Operations: the command line, executors, results and reports; `deepclust` never imports it."""
