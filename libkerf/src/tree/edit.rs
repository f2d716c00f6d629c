//! Changes of nodes.

use super::{Node, Property, path};

impl Node {
    /// Adds a property after the existing ones, or replaces the one with its name in place.
    #[must_use]
    pub fn with_property(mut self, property: Property) -> Self {
        self.set(property);
        self
    }

    /// Adds a child after the existing ones.
    #[must_use]
    pub fn with_child(mut self, child: Node) -> Self {
        self.children.push(child);
        self
    }

    /// Adds children after the existing ones.
    #[must_use]
    pub fn with_children(mut self, children: impl IntoIterator<Item = Node>) -> Self {
        self.children.extend(children);
        self
    }

    /// Adds a property after the existing ones, or replaces the one with its name in place.
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

    /// Adds a child after the existing ones.
    pub fn push(&mut self, child: Node) {
        self.children.push(child);
    }

    /// Renames the node.
    pub fn set_name(&mut self, name: impl Into<String>) {
        self.name = name.into();
    }

    /// Removes the property with this name and returns it.
    pub fn remove_property(&mut self, name: &str) -> Option<Property> {
        let at = self
            .properties
            .iter()
            .position(|there| &*there.name == name)?;
        Some(self.properties.remove(at))
    }

    /// Keeps the properties for which `keep` returns true, called in their order.
    pub(crate) fn retain_properties(&mut self, keep: impl FnMut(&Property) -> bool) {
        self.properties.retain(keep);
    }

    /// As [`Node::child`], but mutable.
    pub fn child_mut(&mut self, name: &str) -> Option<&mut Node> {
        self.children
            .iter_mut()
            .find(|child| path::is_found_by(&child.name, name))
    }

    /// As [`Node::child_mut`]; adds a new child if there is none.
    pub fn child_or_new(&mut self, name: &str) -> &mut Node {
        let found = |child: &Node| path::is_found_by(&child.name, name);
        let at = self.children.iter().position(found).unwrap_or_else(|| {
            self.children.push(Node::new(name));
            self.children.len() - 1
        });
        &mut self.children[at]
    }

    /// Returns the children, mutable.
    pub fn children_mut(&mut self) -> &mut Vec<Node> {
        &mut self.children
    }

    /// Removes the child that [`Node::child`] finds.
    pub fn remove_child(&mut self, name: &str) -> Option<Node> {
        let at = self
            .children
            .iter()
            .position(|child| path::is_found_by(&child.name, name))?;
        Some(self.children.remove(at))
    }

    /// Adds a property, which may repeat a name as in a blob.
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
