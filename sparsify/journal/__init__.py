"""What a run has finished, kept on the disk until its output is there: ``--resume`` goes on from it."""
