"""The miniature: GLM-4V's architecture, trained here to answer questions about simple pictures."""
