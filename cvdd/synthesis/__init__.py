"""Images as parameters: units, the vote of the committee, and the modules that optimise them."""
