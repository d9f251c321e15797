"""What students are told: views of every epoch, the teachers' logits for them, and how both are stored."""
