"""Problems with difficulty levels, worked solutions and verifiers."""
