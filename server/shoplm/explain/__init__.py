"""`shoplm explain`: one customer's answers, their reasons, and where the model looked, as an HTML page."""
