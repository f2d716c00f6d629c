//! Changing nodes.

use super::{Node, Property, path};

impl Node {
    /// Adds a property after those that are there, or replaces the one of its name in its place.
    #[must_use]
    pub fn with_property(mut self, property: Property) -> Self {
        self.set(property);
        self
    }

    /// Adds a child after those that are there.
    #[must_use]
    pub fn with_child(mut self, child: Node) -> Self {
        self.children.push(child);
        self
    }

    /// Adds children after those that are there.
    #[must_use]
    pub fn with_children(mut self, children: impl IntoIterator<Item = Node>) -> Self {
        self.children.extend(children);
        self
    }

    /// Adds a property after those that are there, or replaces the one of its name in its place.
    pub fn set(&mut self, property: Property) {
        match self
            .properties
            .iter_mut()
            .find(|there| there.name == property.name)
        {
            Some(there) => *there = property,
            None => self.properties.push(property),
        }
    }

    /// Adds a child after those that are there.
    pub fn push(&mut self, child: Node) {
        self.children.push(child);
    }

    /// Gives it another name.
    pub fn set_name(&mut self, name: impl Into<String>) {
        self.name = name.into();
    }

    /// Takes the property of this name out.
    pub fn remove_property(&mut self, name: &str) -> Option<Property> {
        let at = self
            .properties
            .iter()
            .position(|there| &*there.name == name)?;
        Some(self.properties.remove(at))
    }

    /// Keeps the properties for which `keep` is true, asked in their order.
    pub(crate) fn retain_properties(&mut self, keep: impl FnMut(&Property) -> bool) {
        self.properties.retain(keep);
    }

    /// The child that [`Node::child`] finds, to change it.
    pub fn child_mut(&mut self, name: &str) -> Option<&mut Node> {
        self.children
            .iter_mut()
            .find(|child| path::is_found_by(&child.name, name))
    }

    /// The same; a new one is added when there is none.
    pub fn child_or_new(&mut self, name: &str) -> &mut Node {
        let found = |child: &Node| path::is_found_by(&child.name, name);
        let at = self.children.iter().position(found).unwrap_or_else(|| {
            self.children.push(Node::new(name));
            self.children.len() - 1
        });
        &mut self.children[at]
    }

    /// The children, to change them.
    pub fn children_mut(&mut self) -> &mut Vec<Node> {
        &mut self.children
    }

    /// Takes out the child that [`Node::child`] finds.
    pub fn remove_child(&mut self, name: &str) -> Option<Node> {
        let at = self
            .children
            .iter()
            .position(|child| path::is_found_by(&child.name, name))?;
        Some(self.children.remove(at))
    }

    /// Adds a property as a blob has it, which may repeat a name.
    pub(crate) fn append(&mut self, property: Property) {
        self.properties.push(property);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_property_is_replaced_in_its_place() {
        let mut node = Node::new("n").with_u32("a", 1).with_u32("b", 2);
        node.set(Property::new("a", 3_u32.to_be_bytes()));
        let names: Vec<_> = node.properties().iter().map(Property::name).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(node.property("a").unwrap().u32(), Ok(3));
        assert!(node.remove_property("a").is_some());
        assert!(node.remove_property("a").is_none());
    }
}
