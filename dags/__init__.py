"""The DAGs: which job, in which order, with which partition. No logic of the jobs."""
