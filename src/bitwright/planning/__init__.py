"""What will happen: sizes, speeds and a recommendation from config.json alone."""
