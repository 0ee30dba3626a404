"""`pumit-train doctor`: two minutes on the user's machine and corpus before a run of days."""
