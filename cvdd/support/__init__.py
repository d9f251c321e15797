"""Small tools that know nothing of data sets and networks: messages, numbers as people read them, seeds."""
