"""Pages for a browser, each one file that needs no network: a run, a comparison, a sweep. Read from files alone."""
