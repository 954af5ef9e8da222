"""What each task does with the last hidden state: sample text, select items, evaluate heads."""
