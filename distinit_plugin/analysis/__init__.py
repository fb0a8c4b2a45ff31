"""What was learned, as numbers and pictures: filters, features, teachers' entropy, and runs class by class."""
