"""The items of a shop: their columns, code trie and filters."""
