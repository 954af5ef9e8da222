"""`shoplm score`: recommendations and predictions for a whole customer base, through the engine that serves calls."""
