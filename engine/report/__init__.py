"""What a run shows: tables, samples and plots."""
